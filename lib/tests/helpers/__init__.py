"""What several test files need: small models, homes with results in them, backends that are present."""
