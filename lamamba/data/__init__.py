"""Where images come from and how they become what the network reads. Only the codec knows what pixels mean."""
