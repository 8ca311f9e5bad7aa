"""gatewatt"""
