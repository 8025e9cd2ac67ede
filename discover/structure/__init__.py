"""From a crystal without coordinates to a full structure: one interface, generators behind it."""
