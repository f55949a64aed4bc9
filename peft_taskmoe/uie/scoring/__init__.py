"""F1 of answers against gold records, and calibration of their confidences."""
