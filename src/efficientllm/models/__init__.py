"""Model families: the only room that knows their attribute names. A family is a row of data."""
