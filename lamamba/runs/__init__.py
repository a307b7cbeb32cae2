"""What lies in a run, checkpoint or model folder, and how a model is opened."""
