"""Instruments: functions that look at a step and never change a run."""
