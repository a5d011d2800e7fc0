"""Measurements: ratios, interleaved, medians. Nothing here is a test; results/ has date and hardware of each."""
