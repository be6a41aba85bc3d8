"""How much error each stage creates: estimated, then measured in full where that matters."""
