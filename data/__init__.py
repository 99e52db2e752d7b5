"""Text, tokenizers and other people's file formats. Nothing here knows the method."""
