"""Profiles: what each part of decoding costs on one device, measured there or computed from its datasheet."""
