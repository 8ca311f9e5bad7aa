"""How closely FLOPs agree before they count as equal: for attacks, measurements and reports alike, so it imports nothing."""

RELATIVE_SLACK = 1e-9
"""FLOPs closer than this share of dense count as equal: sums of price times usage round in the last bits of float64."""
