"""Weight transfer from trainer to servers. Knows neither Megatron nor SGLang."""
