"""Adapter folders: read, checked and written; the model card, the golden texts, a hub, adapters made
elsewhere. Needs no model."""
