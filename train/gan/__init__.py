"""The GAN: its training loop, metrics, alarms and export."""
