"""The engine room: what carries a call, counts it and leaves the world as found. Users never touch it."""
