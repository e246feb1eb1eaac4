"""Model families: the only room that knows their attribute names. One adapter a family, one protocol."""
