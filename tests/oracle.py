"""What streaming models are held against; `flashmoe doctor` uses it too."""

from flashmoe.resident import ResidentSwitch, load_resident, logits, same

__all__ = ["ResidentSwitch", "load_resident", "logits", "same"]
