"""Every public name with the parameters that other code knows, by the paths it is imported from."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

NAMES = """
library.train_util
BaseDataset
BucketManager(no_upscale, max_reso, min_size, max_size, reso_steps)
ControlNetDataset(subsets, batch_size, resolution, network_multiplier, enable_bucket, min_bucket_reso, max_bucket_reso, bucket_reso_steps, bucket_no_upscale, debug_dataset, validation_split, validation_seed, resize_interpolation)
ControlNetSubset(image_dir, conditioning_data_dir, caption_extension, cache_info, num_repeats, shuffle_caption, caption_separator, keep_tokens, keep_tokens_separator, secondary_separator, enable_wildcard, color_aug, flip_aug, face_crop_aug_range, random_crop, caption_dropout_rate, caption_dropout_every_n_epochs, caption_tag_dropout_rate, caption_prefix, caption_suffix, token_warmup_min, token_warmup_step, custom_attributes, validation_seed, validation_split, resize_interpolation)
DatasetGroup(datasets)
DreamBoothDataset(subsets, is_training_dataset, batch_size, resolution, network_multiplier, enable_bucket, min_bucket_reso, max_bucket_reso, bucket_reso_steps, bucket_no_upscale, prior_loss_weight, debug_dataset, validation_split, validation_seed, resize_interpolation, skip_image_resolution)
DreamBoothSubset(image_dir, is_reg, class_tokens, caption_extension, cache_info, alpha_mask, num_repeats, shuffle_caption, caption_separator, keep_tokens, keep_tokens_separator, secondary_separator, enable_wildcard, color_aug, flip_aug, face_crop_aug_range, random_crop, caption_dropout_rate, caption_dropout_every_n_epochs, caption_tag_dropout_rate, caption_prefix, caption_suffix, token_warmup_min, token_warmup_step, custom_attributes, validation_seed, validation_split, resize_interpolation)
FineTuningDataset(subsets, batch_size, resolution, network_multiplier, enable_bucket, min_bucket_reso, max_bucket_reso, bucket_reso_steps, bucket_no_upscale, debug_dataset, validation_seed, validation_split, resize_interpolation)
FineTuningSubset(image_dir, metadata_file, alpha_mask, num_repeats, shuffle_caption, caption_separator, keep_tokens)
ImageInfo(image_key, num_repeats, caption, is_reg, absolute_path)
LossRecorder()
MinimalDataset(resolution, network_multiplier, debug_dataset)
add_dataset_arguments(parser, support_dreambooth, support_caption, support_caption_dropout)
add_dit_training_arguments(parser)
add_masked_loss_arguments(parser)
add_optimizer_arguments(parser)
add_sd_models_arguments(parser)
add_sd_saving_arguments(parser)
add_training_arguments(parser, support_dreambooth)
append_lr_to_logs(logs, lr_scheduler, optimizer_type, including_unet)
append_lr_to_logs_with_names(logs, lr_scheduler, optimizer_type, names)
build_minimum_network_metadata(v2, base_model, network_module, network_dim, network_alpha, network_args)
calculate_sha256(filename)
collator_class(epoch, step, dataset)
conditional_loss(model_pred, target, loss_type, reduction, huber_c)
debug_dataset(train_dataset, show_input_ids)
enable_high_vram(args)
get_epoch_ckpt_name(args, ext, epoch_no)
get_git_revision_hash()
get_huber_threshold_if_needed(args, timesteps, noise_scheduler)
get_last_ckpt_name(args, ext)
get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents)
get_optimizer(args, trainable_params)
get_optimizer_train_eval_fn(optimizer, args)
get_remove_epoch_no(args, epoch_no)
get_remove_step_no(args, step_no)
get_sai_model_spec(state_dict, args, sdxl, lora, textual_inversion, is_stable_diffusion_ckpt, sd3, flux, lumina, hunyuan_image, optional_metadata)
get_sai_model_spec_dataclass(state_dict, args, sdxl, lora, textual_inversion, is_stable_diffusion_ckpt, sd3, flux, lumina, hunyuan_image, optional_metadata)
get_sanitized_config_or_none(args)
get_scheduler_fix(args, optimizer, num_processes)
get_step_ckpt_name(args, ext, step_no)
glob_images_pathlib(dir_path, recursive)
is_schedulefree_optimizer(optimizer, args)
line_to_prompt_dict(line)
load_arbitrary_dataset(args, tokenizer)
load_metadata_from_safetensors(safetensors_file)
load_prompts(prompt_file)
load_target_model(args, weight_dtype, accelerator, unet_use_linear_projection_in_v2)
model_hash(filename)
patch_accelerator_for_fp16_training(accelerator)
precalculate_safetensors_hashes(tensors, metadata)
prepare_accelerator(args)
prepare_dataset_args(args, support_metadata)
prepare_dtype(args)
read_config_from_file(args, parser)
replace_unet_modules(unet, mem_eff_attn, xformers, sdpa)
resume_from_local_or_hf_if_specified(accelerator, args)
sample_images(accelerator, args, epoch, steps, device, vae, tokenizer, text_encoder, unet_wrapped, prompt_replacement, controlnet)
save_and_remove_state_on_epoch_end(args, accelerator, epoch_no)
save_and_remove_state_stepwise(args, accelerator, step_no)
save_state_on_train_end(args, accelerator)
split_train_val(paths, sizes, is_training_dataset, validation_split, validation_seed)
verify_command_line_training_args(args)
verify_training_args(args)

library.config_util
BlueprintGenerator(sanitizer)
ConfigSanitizer(support_dreambooth, support_finetuning, support_controlnet, support_dropout)
add_config_arguments(parser)
generate_controlnet_subsets_config_by_subdirs(train_data_dir, conditioning_data_dir, caption_extension)
generate_dataset_group_by_blueprint(dataset_group_blueprint)
generate_dreambooth_subsets_config_by_subdirs(train_data_dir, reg_data_dir)
load_user_config(file)

library.model_util
convert_controlnet_state_dict_to_diffusers(controlnet_state_dict)
convert_controlnet_state_dict_to_sd(controlnet_state_dict)
convert_ldm_clip_checkpoint_v1(checkpoint)
convert_ldm_clip_checkpoint_v2(checkpoint, max_length)
convert_ldm_unet_checkpoint(v2, checkpoint, config)
convert_ldm_vae_checkpoint(checkpoint, config)
convert_text_encoder_state_dict_to_sd_v2(checkpoint, make_dummy_weights)
convert_unet_state_dict_to_sd(v2, unet_state_dict)
convert_vae_state_dict(vae_state_dict)
get_model_version_str_for_sd1_sd2(v2, v_parameterization)
is_safetensors(path)
load_models_from_stable_diffusion_checkpoint(v2, ckpt_path, device, dtype, unet_use_linear_projection_in_v2)
load_vae(vae_id, dtype)
make_bucket_resolutions(max_reso, min_size, max_size, divisible)
save_diffusers_checkpoint(v2, output_dir, text_encoder, unet, pretrained_model_name_or_path, vae, use_safetensors)
save_stable_diffusion_checkpoint(v2, output_file, text_encoder, unet, ckpt_path, epochs, steps, metadata, save_dtype, vae)

library.sdxl_model_util
convert_diffusers_unet_state_dict_to_sdxl(du_sd)
convert_sdxl_text_encoder_2_checkpoint(checkpoint, max_length)
convert_sdxl_unet_state_dict_to_diffusers(sd)
convert_text_encoder_2_state_dict_to_sdxl(checkpoint, logit_scale)
load_models_from_sdxl_checkpoint(model_version, ckpt_path, map_location, dtype, disable_mmap)
save_diffusers_checkpoint(output_dir, text_encoder1, text_encoder2, unet, pretrained_model_name_or_path, vae, use_safetensors, save_dtype)
save_stable_diffusion_checkpoint(output_file, text_encoder1, text_encoder2, unet, epochs, steps, ckpt_info, vae, logit_scale, metadata, save_dtype)

library.sdxl_train_util
add_sdxl_training_arguments(parser, support_text_encoder_caching)
get_size_embeddings(orig_size, crop_size, target_size, device)
get_timestep_embedding(x, outdim)
load_target_model(args, accelerator, model_version, weight_dtype)
load_tokenizers(args)
sample_images(accelerator, args, epoch, steps, device, vae, tokenizer, text_encoder, unet_wrapped, prompt_replacement, controlnet)
verify_sdxl_training_args(args, support_text_encoder_caching)

library.custom_train_functions
add_custom_train_arguments(parser, support_weighted_captions)
add_v_prediction_like_loss(loss, timesteps, noise_scheduler, v_pred_like_loss)
apply_debiased_estimation(loss, timesteps, noise_scheduler, v_prediction)
apply_masked_loss(loss, batch)
apply_noise_offset(latents, noise, noise_offset, adaptive_noise_scale)
apply_snr_weight(loss, timesteps, noise_scheduler, gamma, v_prediction)
fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler)
get_snr_scale(timesteps, noise_scheduler)
parse_prompt_attention(text)
prepare_scheduler_for_custom_training(noise_scheduler, device)
pyramid_noise_like(noise, device, iterations, discount)
scale_v_prediction_loss_like_noise_prediction(loss, timesteps, noise_scheduler)

library.deepspeed_utils
add_deepspeed_arguments(parser)
prepare_deepspeed_args(args)
prepare_deepspeed_model(args, models)
prepare_deepspeed_plugin(args)

library.flux_utils
analyze_checkpoint_state(ckpt_path)
convert_diffusers_sd_to_bfl(diffusers_sd, num_double_blocks, num_single_blocks)
get_t5xxl_actual_dtype(t5xxl)
load_ae(ckpt_path, dtype, device, disable_mmap)
load_clip_l(ckpt_path, dtype, device, disable_mmap, state_dict)
load_controlnet(ckpt_path, is_schnell, dtype, device, disable_mmap)
load_flow_model(ckpt_path, dtype, device, disable_mmap, model_type)
load_t5xxl(ckpt_path, dtype, device, disable_mmap, state_dict)
pack_latents(x)
prepare_img_ids(batch_size, packed_latent_height, packed_latent_width)
unpack_latents(x, packed_latent_height, packed_latent_width)

library.flux_train_utils
add_flux_train_arguments(parser)
apply_model_prediction_type(args, model_pred, noisy_model_input, sigmas)
compute_density_for_timestep_sampling(weighting_scheme, batch_size, logit_mean, logit_std, mode_scale)
compute_loss_weighting_for_sd3(weighting_scheme, sigmas)
denoise(model, img, img_ids, txt, txt_ids, vec, timesteps, guidance, t5_attn_mask, controlnet, controlnet_img, neg_txt, neg_vec, neg_t5_attn_mask, cfg_scale)
get_lin_function(x1, y1, x2, y2)
get_noisy_model_input_and_timesteps(args, noise_scheduler, latents, noise, device, dtype)
get_schedule(num_steps, image_seq_len, base_shift, max_shift, shift)
get_sigmas(noise_scheduler, timesteps, device, n_dim, dtype)
sample_images(accelerator, args, epoch, steps, flux, ae, text_encoders, sample_prompts_te_outputs, prompt_replacement, controlnet)
time_shift(mu, sigma, t)

library.sd3_utils
ModelSamplingDiscreteFlow(shift)
analyze_checkpoint_state(ckpt_path)
analyze_state_dict_state(state_dict, prefix)
load_clip_g(clip_g_path, dtype, device, disable_mmap, state_dict)
load_clip_l(clip_l_path, dtype, device, disable_mmap, state_dict)
load_mmdit(state_dict, dtype, device, attn_mode)
load_t5xxl(t5xxl_path, dtype, device, disable_mmap, state_dict)
load_vae(vae_path, vae_dtype, device, disable_mmap, state_dict)

library.sd3_train_utils
add_sd3_training_arguments(parser)
compute_density_for_timestep_sampling(weighting_scheme, batch_size, logit_mean, logit_std, mode_scale)
compute_loss_weighting_for_sd3(weighting_scheme, sigmas)
do_sample(height, width, initial_latent, seed, cond, neg_cond, mmdit, steps, guidance_scale, dtype, device)
get_all_sigmas(sampling, steps)
get_noisy_model_input_and_timesteps(args, latents, noise, device, dtype)
get_sigmas(noise_scheduler, timesteps, device, n_dim, dtype)
max_denoise(model_sampling, sigmas)
sample_images(accelerator, args, epoch, steps, mmdit, vae, text_encoders, sample_prompts_te_outputs, prompt_replacement)
save_models(ckpt_path, mmdit, vae, clip_l, clip_g, t5xxl, sai_metadata, save_dtype)

library.sd3_models
MMDiT(params)
SD3Params()
create_sd3_mmdit(params, attn_mode)

library.lumina_util
convert_diffusers_sd_to_alpha_vllm(sd, num_double_blocks)
load_ae(ckpt_path, dtype, device, disable_mmap)
load_gemma2(ckpt_path, dtype, device, disable_mmap, state_dict)
load_lumina_model(ckpt_path, dtype, device, disable_mmap, use_flash_attn, use_sage_attn)
pack_latents(x)
unpack_latents(x, packed_latent_height, packed_latent_width)

library.lumina_train_util
add_lumina_train_arguments(parser)
apply_model_prediction_type(args, model_pred, noisy_model_input, sigmas)
compute_density_for_timestep_sampling(weighting_scheme, batch_size, logit_mean, logit_std, mode_scale)
compute_loss_weighting_for_sd3(weighting_scheme, sigmas)
denoise(scheduler, model, img, txt, txt_mask, neg_txt, neg_txt_mask, timesteps, guidance_scale, cfg_trunc_ratio, renorm_cfg)
get_lin_function(x1, x2, y1, y2)
get_noisy_model_input_and_timesteps(args, noise_scheduler, latents, noise, device, dtype)
get_schedule(num_steps, image_seq_len, base_shift, max_shift, shift)
get_sigmas(noise_scheduler, timesteps, device, n_dim, dtype)
sample_images(accelerator, args, epoch, global_step, nextdit, vae, gemma2_model, sample_prompts_gemma2_outputs, prompt_replacement, controlnet)
save_models(ckpt_path, lumina, sai_metadata, save_dtype, use_mem_eff_save)
time_shift(mu, sigma, t)

library.chroma_models
Chroma(params)
ChromaParams()

library.hunyuan_image_utils
get_timesteps_sigmas(sampling_steps, shift, device)
step(latents, noise_pred, sigmas, step_i)

library.hunyuan_image_models
create_model(attn_mode, split_attn, dtype)
load_hunyuan_image_model(device, dit_path, attn_mode, split_attn, loading_device, dit_weight_dtype, fp8_scaled, lora_weights_list, lora_multipliers)

library.hunyuan_image_vae
load_vae(vae_path, device, disable_mmap, chunk_size)

library.hunyuan_image_text_encoder
get_byt5_prompt_embeds_from_tokens(text_encoder, input_ids, text_mask)
get_byt5_text_tokens(tokenizer, max_length, text_list)
get_glyph_prompt_embeds(tokenizer, text_encoder, prompt)
get_qwen_prompt_embeds(tokenizer, vlm, prompt)
get_qwen_prompt_embeds_from_tokens(vlm, input_ids, attention_mask)
get_qwen_tokens(tokenizer, prompt)
load_byt5(ckpt_path, dtype, device, disable_mmap, state_dict)
load_qwen2_5_vl(ckpt_path, dtype, device, disable_mmap, state_dict)

library.anima_utils
load_anima_model(device, dit_path, attn_mode, split_attn, loading_device, dit_weight_dtype, fp8_scaled, lora_weights_list, lora_multipliers)
load_qwen3_text_encoder(qwen3_path, dtype, device, lora_weights, lora_multipliers)
load_qwen3_tokenizer(qwen3_path)
load_t5_tokenizer(t5_tokenizer_path)
save_anima_model(save_path, dit_state_dict, metadata, dtype)

library.sai_model_spec
ModelSpecMetadata(architecture, implementation, title, resolution)
add_model_spec_arguments(parser)
build_metadata(state_dict, v2, v_parameterization, sdxl, lora, textual_inversion, timestamp, title, reso, is_stable_diffusion_ckpt, author, description, license, tags, merged_from, timesteps, clip_skip, model_config, optional_metadata)
build_metadata_dataclass(state_dict, v2, v_parameterization, sdxl, lora, textual_inversion, timestamp, title, reso, is_stable_diffusion_ckpt, author, description, license, tags, merged_from, timesteps, clip_skip, model_config, optional_metadata)
determine_architecture(v2, v_parameterization, sdxl, lora, textual_inversion, model_config)
determine_implementation(lora, textual_inversion, sdxl, model_config, is_stable_diffusion_ckpt)
determine_resolution(reso, sdxl, model_config, v2, v_parameterization)
file_to_data_url(file_path)
load_metadata_from_safetensors(safetensors_file)

library.custom_offloading_utils
ModelOffloader(blocks, blocks_to_swap, device, debug)
Offloader(num_blocks, blocks_to_swap, device, debug)
create_cpu_offloading_wrapper(func, device)
swap_weight_devices_cuda(device, layer_to_cpu, layer_to_cuda)
swap_weight_devices_no_cuda(device, layer_to_cpu, layer_to_cuda)
weighs_to_device(layer, device)

library.safetensors_utils
MemoryEfficientSafeOpen(filename, disable_numpy_memmap)
TensorWeightAdapter(weight_convert_hook, original_f)
WeightTransformHooks(split_hook, concat_hook, rename_hook)
find_key(safetensors_file, starts_with, ends_with)
get_split_weight_filenames(file_path)
load_safetensors(path, device, disable_mmap, dtype)
load_split_weights(file_path, device, disable_mmap, dtype)
mem_eff_save_file(tensors, filename, metadata)

library.utils
add_logging_arguments(parser)
fire_in_thread(f, args, kwargs)
pil_resize(image, size, interpolation)
resize_image(image, width, height, resized_width, resized_height, resize_interpolation)
setup_logging(args, log_level, reset)
str_to_dtype(s, default_dtype)
validate_interpolation_fn(interpolation_str)

networks.lora
LoRAModule(lora_name, org_module, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout)
LoRANetwork(text_encoder, unet, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout, conv_lora_dim, conv_alpha, block_dims, block_alphas, conv_block_dims, conv_block_alphas, modules_dim, modules_alpha, module_class, varbose, is_sdxl)
create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet)
create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd, for_inference)

networks.lora_flux
LoRAModule(lora_name, org_module, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout)
LoRANetwork(text_encoders, unet, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout, conv_lora_dim, conv_alpha, module_class, modules_dim, modules_alpha, train_blocks, split_qkv, train_t5xxl, type_dims, in_dims, train_double_block_indices, train_single_block_indices, reg_dims, ggpo_beta, ggpo_sigma, reg_lrs, verbose)
create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet)
create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd, for_inference)

networks.lora_sd3
LoRAModule(lora_name, org_module, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout)
LoRANetwork(text_encoders, unet, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout, conv_lora_dim, conv_alpha, module_class, modules_dim, modules_alpha, train_t5xxl, type_dims, emb_dims, train_block_indices, verbose)
create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet)
create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd, for_inference)

networks.lora_lumina
LoRAModule(lora_name, org_module, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout)
LoRANetwork(text_encoders, unet, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout, conv_lora_dim, conv_alpha, module_class, modules_dim, modules_alpha, train_blocks, type_dims, embedder_dims, verbose)
create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet)
create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd, for_inference)

networks.lora_hunyuan_image
HunyuanImageLoRANetwork(text_encoders, unet, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout, conv_lora_dim, conv_alpha, module_class, modules_dim, modules_alpha, split_qkv, reg_dims, ggpo_beta, ggpo_sigma, reg_lrs, verbose)
LoRAModule(lora_name, org_module, multiplier, lora_dim, alpha, dropout, rank_dropout, module_dropout)
create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet)
create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd, for_inference)

train_network
NetworkTrainer()
VideoDialect()
setup_parser()

hv_train_network
DiTOutput(pred, target)
HunyuanVideoNetworkTrainer()
NetworkTrainer()
SS_METADATA_KEY_BASE_MODEL_VERSION
SS_METADATA_KEY_NETWORK_ALPHA
SS_METADATA_KEY_NETWORK_ARGS
SS_METADATA_KEY_NETWORK_DIM
SS_METADATA_KEY_NETWORK_MODULE
SS_METADATA_MINIMUM_KEYS
clean_memory_on_device(device)
collator_class(epoch, dataset)
compute_density_for_timestep_sampling(weighting_scheme, batch_size, logit_mean, logit_std, mode_scale)
compute_loss_weighting_for_sd3(weighting_scheme, noise_scheduler, timesteps, device, dtype)
get_sigmas(noise_scheduler, timesteps, device, n_dim, dtype)
hv_setup_parser(parser)
line_to_prompt_dict(line)
load_prompts(prompt_file)
main()
prepare_accelerator(args)
read_config_from_file(args, parser)
set_seed
setup_parser()
setup_parser_common()
should_sample_images(args, steps, epoch)

fpack_train_network
FramePackNetworkTrainer()
fpack_setup_parser(parser)
main()
setup_parser()

wan_train_network
WanNetworkTrainer()
main()
setup_parser()
wan_setup_parser(parser)

sdxl_train_network
SdxlNetworkTrainer()
setup_parser()

flux_train_network
FluxNetworkTrainer()
setup_parser()

anima_train_network
AnimaNetworkTrainer()
setup_parser()

sd3_train_network
Sd3NetworkTrainer()
setup_parser()

lumina_train_network
LuminaNetworkTrainer()
setup_parser()

hunyuan_image_train_network
HunyuanImageNetworkTrainer()
sample_images(accelerator, args, epoch, steps, dit, vae, text_encoders, sample_prompts_te_outputs, prompt_replacement)
setup_parser()
"""
TRAINER = """
all_reduce_network(accelerator, network)
assert_extra_args(args, train_dataset_group, val_dataset_group)
cache_text_encoder_outputs_if_needed(args, accelerator, unet, vae, text_encoders, dataset, weight_dtype)
call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype)
cast_text_encoder(args)
cast_unet(args)
cast_vae(args)
compute_loss(args, output, timesteps, noise_scheduler, dit_dtype, network_dtype, global_step)
encode_images_to_latents(args, vae, images)
epoch_logging(accelerator, logs, global_step, epoch)
extra_metadata(args)
extra_step_logs(args, logs)
extra_trainable_params(args, accelerator, network, transformer, trainable_params)
generate_step_logs(args, current_loss, avr_loss, lr_scheduler, lr_descriptions, optimizer, keys_scaled, mean_norm, maximum_norm, mean_grad_norm, mean_combined_norm)
get_latents_caching_strategy(args)
get_model_version(args)
get_models_for_text_encoding(args, accelerator, text_encoders)
get_noise_pred_and_target(args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet, network, weight_dtype, train_unet, is_train)
get_noise_scheduler(args, device)
get_sai_model_spec(args)
get_text_encoder_outputs_caching_strategy(args)
get_text_encoders_train_flags(args, text_encoders)
get_text_encoding_strategy(args)
get_tokenize_strategy(args)
get_tokenizers(tokenize_strategy)
is_text_encoder_not_needed_for_training(args)
is_train_text_encoder(args)
load_target_model(args, weight_dtype, accelerator)
load_unet_lazily(args, weight_dtype, accelerator, text_encoders)
on_after_sample_images(accelerator, args, epoch, steps, vae, transformer, network, sample_parameters, dit_dtype)
on_before_sample_images(accelerator, args, epoch, steps, vae, transformer, network, sample_parameters, dit_dtype)
on_post_optimizer_step(args, accelerator, network, transformer, sync_gradients, global_step)
on_post_save(args, accelerator, network, transformer, ckpt_name, save_dtype, metadata, force_sync_upload)
on_step_start(args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train)
on_train_start(args, accelerator, network, transformer, optimizer)
on_transformer_loaded(args, accelerator, transformer)
on_validation_step_end(args, accelerator, network, text_encoders, unet, batch, weight_dtype)
post_process_loss(loss, args, timesteps, noise_scheduler)
post_process_network(args, accelerator, network, text_encoders, unet)
prepare_text_encoder_fp8(index, text_encoder, te_weight_dtype, weight_dtype)
prepare_text_encoder_grad_ckpt_workaround(index, text_encoder)
prepare_unet_with_accelerator(args, accelerator, unet)
process_batch(batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype, accelerator, args, text_encoding_strategy, tokenize_strategy, is_train, train_text_encoder, train_unet)
sample_images(accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet)
shift_scale_latents(args, latents)
step_logging(accelerator, logs, global_step, epoch)
train(args)
update_metadata(metadata, args)
val_logging(accelerator, logs, global_step, epoch, val_step)
"""
VIDEO = """
architecture
architecture_full_name
control_training
i2v_training
load_transformer(accelerator, args, dit_path, attn_mode, split_attn, loading_device, dit_weight_dtype)
load_vae(args, vae_dtype, vae_path)
handle_model_specific_args(args)
call_dit(args, accelerator, transformer, latents, batch, noise, noisy_model_input, timesteps, network_dtype)
get_noisy_model_input_and_timesteps(args, noise, latents, timesteps, noise_scheduler, device, dtype)
process_batch(args, accelerator, transformer, network, batch, latents, noise, noise_scheduler, dit_dtype, network_dtype, vae, global_step)
scale_shift_latents(latents)
"""
PASSES_ARGUMENTS_ON = {"fire_in_thread"}
"""what takes any arguments by its nature"""


def listed(text: str) -> list[tuple[str, str, list[str] | None]]:
    """(path, name, parameters or None where other code passes them by name alone)."""
    found, path = [], ""
    for line in text.strip().splitlines():
        name, _, rest = line.strip().partition("(")
        if "." in name or (not rest and name.endswith("_network")):
            path = name
        elif name:
            found.append((path, name, re.findall(r"\w+", rest) if rest else None))
    return found


def check(thing, name: str, known: list[str] | None) -> None:
    if not callable(thing):  # a constant
        assert known is None
        return
    parameters = list(inspect.signature(thing).parameters.values())
    if name not in PASSES_ARGUMENTS_ON:
        assert not [p for p in parameters if p.kind is p.VAR_POSITIONAL], f"{name} takes *{parameters[-1].name}"
    if known is None:
        return
    named = [p.name for p in parameters if p.name != "self"]
    assert named[: len(known)] == known
    further = [p for p in parameters if p.name in named[len(known) :]]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in further), f"{name} needs {further}"


@pytest.mark.parametrize(
    ("path", "name", "known"), listed(NAMES), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_name_is_there_with_its_parameters(path, name, known):
    check(getattr(importlib.import_module(path), name), name, known)


@pytest.mark.parametrize(
    ("path", "name", "known"),
    listed("library.compat\n" + TRAINER.strip()),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trainer_has_its_methods(path, name, known):
    from anima_train_network import AnimaNetworkTrainer

    check(getattr(AnimaNetworkTrainer(), name), name, known)


@pytest.mark.parametrize(
    ("path", "name", "known"),
    listed("library.compat\n" + VIDEO.strip()),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_dialect_of_video_trainers_has_its_methods(path, name, known):
    from hv_train_network import HunyuanVideoNetworkTrainer

    check(getattr(HunyuanVideoNetworkTrainer(), name), name, known)


def test_the_page_lists_them_all_with_their_parameters():
    text = (Path(__file__).parents[2] / "docs" / "public_names.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0].strip("` "): part for part in text.split("\n## ")}
    own = "A trainer of one's own"
    wanted = [*listed(NAMES), *((own, name, known) for _, name, known in [*listed(TRAINER), *listed(VIDEO)])]
    rows = [(path, name, f"| `{name}` | {'`' + ', '.join(known) + '`' if known else ''} |") for path, name, known in wanted]
    assert not [f"{path}.{name}" for path, name, row in rows if row.replace("|  |", "| |") not in sections[path].replace("|  |", "| |")]


def test_all_that_train_util_hands_on_is_listed():
    from library import train_util

    names = {name for path, name, _ in listed(NAMES) if path == "library.train_util"}
    assert names == set(train_util.__all__)
