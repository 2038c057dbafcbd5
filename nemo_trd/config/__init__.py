"""Settings: what `conf/` may hold, in types, and the rules between settings. The ground floor.

Here: `schema` (each setting and its meaning), `rules` (and those of data sets, of teachers and of
servers), `load` (composing and checking), `lengths`. May import no other room. Nothing that reads a
model or data, and no torch: a wrong setting is refused in a second.
"""
