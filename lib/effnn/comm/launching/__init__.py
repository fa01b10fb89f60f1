"""Ranks as processes: started, watched, ended."""
