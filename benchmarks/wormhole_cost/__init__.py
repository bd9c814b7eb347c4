"""What a wormhole costs beside the modules of its span."""
