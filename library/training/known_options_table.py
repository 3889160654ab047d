"""Written by tools/make_known_options.py: defaults of known options as JSON -> names."""

NAMES_BY_DEFAULTS: dict[str, str] = {
    '["", null]': ("negative_prompt"),
    '[""]': ("keep_tokens_separator lr_scheduler_type optimizer_type system_prompt undesired_tags"),
    '[",", ", "]': ("caption_separator"),
    '["."]': ("trainable_modules"),
    '[".caption", ".txt"]': ("caption_extension"),
    '["512,512", "512x512,384x384,256x256,128x128"]': ("max_resolution"),
    '["SmilingWolf/wd-v1-4-convnext-tagger-v2"]': ("repo_id"),
    '["V4_DEFAULT_20"]': ("sampler_preset"),
    '["ai-toolkit"]': ("src"),
    '["bf16"]': ("gemma2_dtype text_cache_dtype"),
    '["bfloat16", "bf16"]': ("dtype"),
    '["constant"]': ("lr_scheduler self_flow_teacher_coupling_decay"),
    '["cpu"]': ("loading_device working_device"),
    '["ddim"]': ("sample_sampler sampler"),
    '["default"]': ("compile_mode"),
    '["dev", null]': ("model_version"),
    '["first"]': ("i2v_mode"),
    '["float"]': ("precision saving_precision"),
    '["flow_match"]': ("editing_scheduler"),
    '["flux", "full"]': ("model_type"),
    '["images", "video"]': ("output_type"),
    '["inductor", "NO"]': ("dynamo_backend"),
    '["inductor"]': ("compile_backend"),
    '["jsonl"]': ("output_format"),
    '["l2"]': ("loss_type"),
    '["microsoft/git-large-textcaps", null]': ("model_id"),
    '["no", null]': ("mixed_precision"),
    '["no"]': ("save_precision_as"),
    '["none"]': ("cfg_skip_mode"),
    '["original"]': ("emb_normalize_mode"),
    '["outputs"]': ("outdir"),
    '["patch"]': ("dino_loss_feature_mode"),
    '["sd-scripts"]': ("dst"),
    '["sigma_scaled", "raw"]': ("model_prediction_type"),
    '["sigmoid", "sigma", "shift", "ideogram4_shift"]': ("timestep_sampling"),
    '["snr"]': ("huber_schedule"),
    '["t2i", "t2v", "k5-pro-t2v-5s-sd", null, "t2v-14B"]': ("task"),
    '["topcdf"]': ("nabla_method"),
    '["torch", null]': ("attn_mode"),
    '["uniform", "none"]': ("weighting_scheme"),
    '["unipc"]': ("sample_solver"),
    '["vit"]': ("dino_loss_backend"),
    '["wd14_tagger_model"]': ("model_dir"),
    "[0.0001]": ("control_net_lr"),
    "[0.01]": ("min_diff"),
    "[0.0]": (
        "caption_dropout_rate caption_tag_dropout_rate clip_g_dropout_rate clip_guidance_scale "
        "clip_image_guidance_scale clip_l_dropout_rate dino_loss_weight guidance_rescale guidance_rescale_apg "
        "ideogram4_timestep_mu logit_mean pos_emb_random_crop_rate self_flow_teacher_coupling_prob slg_start "
        "t5_dropout_rate validation_split vgg16_guidance_scale"
    ),
    "[0.125]": ("gradual_latent_ratio_step"),
    "[0.1]": ("huber_c"),
    "[0.24]": ("magcache_threshold"),
    "[0.25]": ("cfg_trunc_ratio mask_ratio"),
    "[0.2]": ("magcache_retention_ratio"),
    "[0.35]": ("thresh"),
    "[0.3]": ("multires_noise_discount slg_end"),
    "[0.5]": ("ds_ratio gradual_latent_ratio rope_scaling_factor y1"),
    "[0.8]": ("self_flow_gamma"),
    "[0.95]": ("beta"),
    "[0.999]": ("ema_decay"),
    "[0.99]": ("clamp_quantile"),
    "[0.9]": ("nabla_P top_p"),
    "[0]": (
        "caption_dropout_every_n_epochs epoch global_step keep_tokens lr_decay_steps lr_warmup_steps rcm_dilate_size "
        "self_flow_gamma_warmup_steps token_warmup_step trim_tail_frames"
    ),
    "[1, 16, 4, null]": ("batch_size"),
    "[1, null]": ("vae_batch_size"),
    "[1.0, 3.0, 5.0, 6.0]": ("discrete_flow_shift"),
    "[1.0, 5.0]": ("cfg_scale"),
    "[1.0, null, [1.0]]": ("lora_multiplier"),
    "[1.004]": ("initial_sigma"),
    "[1.0]": (
        "gradual_latent_s_noise huber_scale ideogram4_timestep_std logit_std max_grad_norm prior_loss_weight "
        "renorm_cfg self_flow_teacher_mismatch_ratio sigmoid_scale training_shift"
    ),
    "[1.15]": ("y2"),
    "[1.29]": ("mode_scale"),
    "[1024]": ("image_height image_width max_bucket_reso max_new_tokens"),
    "[11]": ("nabla_wT"),
    "[128]": ("vae_sample_size"),
    "[1360, 1024, null]": ("width"),
    "[1600]": ("max_train_steps"),
    "[1]": (
        "dataset_repeats dino_loss_every_n_steps divisible_by gradient_accumulation_steps images_per_prompt "
        "lr_scheduler_num_cycles lr_scheduler_power n_iter network_alpha num_beams num_images num_vectors_per_token "
        "token_warmup_min train_batch_size"
    ),
    "[2.5, null]": ("noise_clip_std"),
    "[20]": ("vgg16_guidance_layer"),
    "[224]": ("dino_loss_resize thres2"),
    "[256, null]": ("gemma2_max_token_length"),
    "[256]": ("min_bucket_reso t5xxl_token_length"),
    "[28]": ("highres_fix_steps"),
    "[2]": ("block_swap_ring_size zero_stage"),
    "[2e-06]": ("learning_rate"),
    "[3.0]": ("slg_scale"),
    "[3.5, 4.0, 1.0, 5.0, 6.0, 5.5, null, 0.0]": ("guidance_scale"),
    "[3.5, null]": ("guidance"),
    "[30, 24, 16]": ("fps"),
    "[32]": ("thres1"),
    "[38]": ("apg_start_step_ocr"),
    "[3]": ("gradual_latent_every_n_steps nabla_wH nabla_wW rcm_kernel_size"),
    "[4.0, 2.5, 10.0, 6.0]": ("embedded_cfg_scale"),
    "[4]": ("dim new_rank output_layers"),
    "[5.0, null, 3.0, 7.0]": ("flow_shift"),
    "[5.0]": ("video_seconds"),
    "[50, 25, null]": ("infer_steps"),
    "[512]": ("qwen3_max_token_length qwen_max_length t5_max_token_length"),
    "[5]": ("apg_start_step_general min_length"),
    "[64]": ("bucket_reso_steps"),
    "[650]": ("ds_timesteps_1 ds_timesteps_2"),
    "[6]": ("magcache_k"),
    "[7.5, null]": ("noise_scale_end noise_scale_start"),
    "[7.5]": ("scale"),
    "[75, 50]": ("max_length"),
    "[768, 1024, null]": ("height"),
    "[77]": ("clip_max_length"),
    "[8, null]": ("max_data_loader_n_workers"),
    "[80]": ("console_width"),
    "[9]": ("latent_window_size"),
    "[[1024, 1024], [2048, 2048], [256, 256]]": ("image_size"),
    "[[256, 256]]": ("video_size"),
    "[[], null]": ("lora_weights"),
    "[[]]": ("ref_images"),
    "[]": ("caption_weights"),
    '[false, ""]': ("alpha_mask"),
    "[false, null]": ("v_parameterization"),
    "[false]": (
        "add_system_prompt_to_negative_prompt append_original_name append_tags apply_lg_attn_mask apply_t5_attn_mask "
        "async_upload beam_search bell bf16 block_swap_h2d_only block_swap_optimizer_patch_params "
        "blockwise_fused_optimizers bucket_no_upscale bulk_decode cache_info cache_latents cache_latents_to_disk "
        "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk character_tag_expand character_tags_first "
        "color_aug compile compile_fullgraph concat console_log_simple copy_associated_files cpu_noise "
        "cpu_offload_checkpointing cuda_allow_tf32 cuda_cudnn_benchmark ddp_gradient_as_bucket_view ddp_static_graph "
        "debiased_estimation_loss debug debug_dataset deepspeed diffusers diffusers_xformers dim_from_weights "
        "dino_loss_use_gram disable_cudnn_backend disable_mmap_load_safetensors disable_numpy_memmap dynamo_dynamic "
        "dynamo_fullgraph edit edit_plus enable_bucket enable_scaled_pos_embed enable_wildcard exclude_single_blocks "
        "f1 flash3 flash_attn flip_aug float flux force_download force_nabla_attention "
        "force_scheduler_zero_steps_offset force_v2_1_time_embedding fp16 fp16_master_weights_and_gradients fp8 "
        "fp8_base fp8_base_unet fp8_fast fp8_llm fp8_scaled fp8_t5 fp8_te fp8_text_encoder fp8_vl frequency_tags "
        "full_bf16 full_fp16 full_path fused_backward_pass gradient_checkpointing gradient_checkpointing_cpu_offload "
        "highres_fix_disable_control_net highres_fix_latents_upscaling highres_fix_save_1st highvram i2v "
        "img_in_txt_in_offloading interactive ip_noise_gamma_random_strength iter_same_seed keep_cache "
        "keep_original_aspect lazy_loading log_config log_loss_stats lowram lycoris magcache_calibration masked_loss "
        "mem_eff_attn mem_eff_load_save mem_eff_safe_open mem_eff_save merge_lora_weights multiple_faces nabla_resize "
        "network_merge network_pre_calc network_show_meta network_train_text_encoder_only network_train_unet_only "
        "no_half_vae no_metadata no_preview no_resize_control no_sort no_token_padding no_vae_load "
        "noise_offset_random_strength offload offload_dit_during_sampling offload_inactive_dit one_frame "
        "one_frame_auto_resize one_frame_no_2x one_frame_no_4x onnx opt_channels_last output_config "
        "persistent_data_loader_workers preserve_distribution_shape quantized_qwen random_crop rcm_debug_save "
        "rcm_relative_threshold recursive remove_first_image_from_target remove_underscore remove_words "
        "resize_control_to_image_size resize_control_to_official_size resize_fit resume_from_huggingface reverse "
        "rotate sage_attn sample_at_first save_as_png save_clip save_state save_state_on_train_end "
        "save_state_to_huggingface save_t5xxl scale_v_pred_loss_like_noise_pred sdpa sdxl self_flow "
        "sequential_file_name show_all_keys show_skipped shuffle shuffle_caption shuffle_prompts skip_cache_check "
        "skip_existing skip_latents_validity_check skip_t2i_visual_dummy skip_until_initial_step split_attn "
        "split_mode split_uncond text_encoder_cpu torch_compile train_t5xxl train_text_encoder turbo_dit_cache "
        "unet_only unet_use_linear_projection unsloth_offload_checkpointing use_32bit_attention use_8bit_adam "
        "use_flash_attn use_lion_optimizer use_object_template use_original_file_name "
        "use_pinned_memory_for_block_swap use_quality_tags use_quality_tags_as_last_tag use_rating_tags "
        "use_rating_tags_as_last_tag use_safetensors use_sage_attn use_style_template use_t5xxl_cache_only "
        "use_unconditional_dit_for_lora_sampling v1 v2 vae_cache_cpu vae_disable_cache vae_enable_patch_conv "
        "vae_enable_tiling vae_tiling validate_caption_structure verbose warn_on_caption_issues weighted_captions "
        "xformers zero3_init_flag zero3_save_16bit_model zero_terminal_snr"
    ),
    '[null, ".", "outputs"]': ("output_dir"),
    '[null, "A photo of a cat", "A beautiful sunset over the mountains", "A photo of cat", "# Image Annotator\\nYou are a professional image annotator. Please complete the following task based on the input image.\\n## Create Image Caption\\n1. Write the caption using natural, descriptive text without structured formats or rich text.\\n2. Enrich caption details by including: object attributes, vision relations between objects, and environmental details.\\n3. Identify the text visible in the image, without translation or explanation, and highlight it in the caption with quotation marks.\\n4. Maintain authenticity and accuracy, avoid generalizations."]': (
        "prompt"
    ),
    '[null, "bf16"]': ("ae_dtype"),
    '[null, "cpu", "cuda"]': ("device"),
    '[null, "merged_model.safetensors"]': ("output"),
    '[null, "safetensors", "pt"]': ("save_model_as"),
    "[null, 0.8]": ("strength"),
    "[null, 0]": ("blocks_to_swap"),
    "[null, 1280]": ("max_size"),
    "[null, 129]": ("video_length"),
    "[null, 16]": ("dit_in_channels"),
    "[null, 256]": ("t5xxl_max_token_length"),
    "[null, 42, 0, 1, 32]": ("seed"),
    "[null, 50, 36, 28]": ("steps"),
    "[null]": (
        "H W XTI_embeddings adaptive_noise_scale ae ae_path always_first_tags artist_threshold "
        "automatic_prompt_lang_for_layered base_weights base_weights_multiplier beta2 block_lr byt5 caption_extention "
        "caption_prefix caption_suffix cfg_apply_ratio character_threshold ckpt ckpt_dir ckpt_path clip clip_g clip_l "
        "clip_l_dtype clip_l_save_to clip_skip clip_vision_strength compile_args compile_cache_size_limit "
        "compile_dynamic cond_emb_dim conditioning_data_dir config_file console_back console_log_file "
        "console_log_level console_num_images control_image_mask_path control_image_path control_net_lllite_models "
        "control_net_models control_net_multipliers control_net_preps control_net_ratios control_net_weights "
        "control_path controlnet_model_name_or_path conv_dim copyright_threshold crop_left crop_ratio crop_size "
        "crop_top cross_attn_lr custom_system_prompt dataset_class dataset_config ddp_timeout debug_mode "
        "diffusers_path diffusers_prefix dino_loss_layer dino_loss_model_type dit dit_dtype dit_high_noise "
        "double_blocks_to_swap ds_depth_1 ds_depth_2 dst_dir dst_path dynamic_method dynamic_param dynamo_mode "
        "end_image_path exclude_patterns face_crop_aug_range flux_dtype flux_model frames from_file from_module "
        "fused_optimizer_groups gemma2 gemma2_path general_threshold gradual_latent_timesteps "
        "gradual_latent_unsharp_params guidance_scale_high_noise guide_image_path highres_fix_scale "
        "highres_fix_strength highres_fix_upscaler highres_fix_upscaler_args huggingface_path_in_repo "
        "huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token image image_dir "
        "image_encoder image_last image_path image_pattern in_json include_patterns init_word initial_epoch "
        "initial_step input interpolation ip_noise_gamma latent_paddings latent_path layout_bboxes lbws "
        "learning_rate_te learning_rate_te1 learning_rate_te2 learning_rate_te3 llm_adapter_lr llm_adapter_path "
        "load_original_model_to load_precision load_tuned_model_to log_prefix log_tracker_config log_tracker_name "
        "log_with logging_dir lokr_rank lora_multiplier_high_noise lora_weight lora_weight_high_noise "
        "lr_scheduler_args lr_scheduler_min_lr_ratio lr_scheduler_timescale magcache_mag_ratios mask_path "
        "max_embeddings_multiples max_timestep max_token_length max_train_epochs max_validation_steps meta_threshold "
        "metadata metadata_arch metadata_author metadata_description metadata_is_negative_embedding metadata_license "
        "metadata_merged_from metadata_preprocessor metadata_reso metadata_tags metadata_thumbnail metadata_title "
        "metadata_trigger_phrase metadata_usage_hint min_size min_snr_gamma min_timestep mlp_lr mod_lr model "
        "model_org model_path model_threshold model_tuned models mu multires_noise_iterations negative_scale "
        "network_args network_dim network_dropout network_merge_n_models network_module network_mul "
        "network_regional_mask_max_color_codes network_weights network_weights_ema network_weights_proj new_conv_rank "
        "noise_offset noise_offset_prob noise_offset_range num_last_block_to_freeze num_layers num_timestep_buckets "
        "num_workers offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
        "offload_param_nvme_path one_frame_inference optimizer_args original_height original_height_negative "
        "original_width original_width_negative output_file output_name output_path override_dit "
        "pretrained_model_name_or_path prompt2 prompter_module_args pyramid_noise_discount_range pyramid_noise_prob "
        "qwen3 ratios rcm_threshold reference_model reg_data_dir resize_face_size resize_interpolation resolution "
        "resume rope_scaling_timestep_threshold sample_batch_size sample_every_n_epochs sample_every_n_steps "
        "sample_prompts save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state "
        "save_last_n_steps save_last_n_steps_state save_merged_model save_n_epoch_ratio save_path save_precision "
        "save_to scale_weight_norms scheduler_scale sd_model secondary_separator self_attn_lr "
        "self_flow_teacher_coupling_decay_steps show_timesteps sigma_rel single_blocks_to_swap slg_layers slg_mode "
        "src_dir src_path stop_text_encoder_training student_feature_layer t5 t5_tokenizer_path t5xxl t5xxl_device "
        "t5xxl_dtype t5xxl_save_to tag_replacement target teacher_feature_layer text_encoder text_encoder1 "
        "text_encoder2 text_encoder_batch_size text_encoder_clip text_encoder_dtype text_encoder_lr text_encoder_qwen "
        "textual_inversion_embeddings timestep_boundary token_string tokenizer_cache_dir train_data_dir "
        "training_comment turbo_dit unconditional_dit unet_lr unit v_pred_like_loss vae vae_chunk_size vae_dtype "
        "vae_path vae_slices vae_spatial_tile_sample_min_size validate_every_n_epochs validate_every_n_steps "
        "validation_seed variant video_path video_sections wandb_api_key wandb_run_name weights"
    ),
    "[true]": ("dino_loss_use_norm nabla_add_sta"),
}
