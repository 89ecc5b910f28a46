"""Results as pages: one self-contained HTML per run and per comparison, a page of the claims."""
