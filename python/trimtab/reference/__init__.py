"""The obvious NumPy version of every op: the oracle of the tests. bfloat16 travels as uint16 bits."""
