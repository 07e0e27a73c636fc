"""Adapters that other programs made: PEFT, the HF Trainer, AutoTrain and loralib. Reading runs no code that a
file brings."""
