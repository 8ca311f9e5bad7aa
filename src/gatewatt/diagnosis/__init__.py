"""The doctor: is what an attack says about a network to be believed, or does the network only hide its gradient?"""

from gatewatt.diagnosis.check import Check, Diagnosis, Estimate, Finding, Outcome
from gatewatt.diagnosis.evidence import Evidence, Settings
from gatewatt.diagnosis.examine import CHECKS, doctor, examine

__all__ = ["CHECKS", "Check", "Diagnosis", "Estimate", "Evidence", "Finding", "Outcome", "Settings", "doctor", "examine"]
