"""Training of Lumina-Image 2.0 as other trainers call it; see docs/public_names.md."""

from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(__name__, {
    **homes(
        "library.compat.lumina_names", "add_lumina_train_arguments", "denoise", "get_lin_function", "sample_images",
        "save_models",
    ),
    **homes("library.compat.flows", "apply_model_prediction_type", "get_noisy_model_input_and_timesteps", "get_sigmas"),
    **homes(
        "library.flux_train_utils", "compute_density_for_timestep_sampling", "compute_loss_weighting_for_sd3",
        "get_schedule", "time_shift",
    ),
})
