"""What a history shows, for people and build servers: words, tables for builds, and one HTML page."""
