"""What kinds of adapters are made of, and the registry of the kinds; the kinds themselves are the modules of
`networks`."""
