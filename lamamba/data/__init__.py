"""Data: sources of files, images, autoencoders, stored latents, training sets. codec.py alone scales pixels."""
