"""The page in the browser (`lamamba app`): choose classes and settings, watch the denoising, save the picture."""
