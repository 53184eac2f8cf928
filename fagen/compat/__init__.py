"""The signatures that people already use, on top of `fagen.attention`."""
