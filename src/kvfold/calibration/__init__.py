"""Tables learned from data: collected per layer, fitted by the codec, kept in a checked file."""
