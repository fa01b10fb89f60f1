"""From masks to a really smaller model: cut, saved, loaded, exported."""
