"""Everything that knows CLIP's insides: loading, prompts, the text and the image tower."""
