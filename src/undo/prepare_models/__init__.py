"""Models to start from: reduced Gemma-2 pretrained here, or a model that exists."""
