"""The number formats that an engine may compute in, emulated, and which of them a dump shows."""
