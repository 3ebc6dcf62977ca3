"""What the training scripts are made of: data lists, latents, losses, the loop."""
