"""What gatewatt promises about reliability, one function per promise; ``benchmarks/reliability.py`` runs them and writes down what came out."""
