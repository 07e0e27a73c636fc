"""An adapter to something else: merged, extracted, combined, converted, exported, looked into."""
