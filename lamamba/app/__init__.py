"""A page to play on: choose classes and settings, watch the denoising, keep the picture (`lamamba app`)."""
