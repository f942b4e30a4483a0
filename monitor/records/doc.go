// Package records is data at rest: tables of numbers in CSV or Parquet, inference records and labels as Parquet, and
// profiles as JSON, each under a key that says model, version and time. It decides the formats and where things lie; it
// refuses to judge what they show.
package records
