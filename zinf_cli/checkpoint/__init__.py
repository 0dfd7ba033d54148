"""What a checkpoint is on disk: its folder, its manifest, whether it is whole. No torch: the launcher asks too."""
