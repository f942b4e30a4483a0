#!/bin/sh
# Makes Temporal's two databases and brings their schemas up to date. Safe to run again: update comes first, because a
# repeated setup would reset the version and then fail.
set -eu
tool() { temporal-sql-tool --plugin postgres12 --ep postgres -p 5432 -u orrery --pw "$SQL_PASSWORD" "$@"; }
for db in temporal temporal_visibility; do
  kind=${db#temporal_}
  [ "$kind" = "$db" ] && kind=temporal
  schema=/etc/temporal/schema/postgresql/v12/$kind/versioned
  tool --db $db create || true
  tool --db $db update-schema -d "$schema" || {
    tool --db $db setup-schema -v 0.0
    tool --db $db update-schema -d "$schema"
  }
done
