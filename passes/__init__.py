"""The passes of the compiler; imported as ``fxslim.passes``."""
