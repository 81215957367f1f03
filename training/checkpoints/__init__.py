"""What a run leaves in its folder, so that another can go on."""
