"""Several adapters -> one behaviour. One file per method."""
