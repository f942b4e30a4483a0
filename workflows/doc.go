// Package workflows decides what happens next. Its functions are deterministic: they read no clock, do no I/O, and take
// everything they need from their input and from activities. What a workflow is called, on which queue it runs and how
// its id is made stands at the top of its file; none of these ever change, because histories refer to them.
//
// A roll-out:
//
//	preflight -> [approval] -> warm (weight 0) -> step -> bake -> … -> promote -> watch
//	    |            |            |                 |       |
//	    +------------+------------+-----------------+-------+--> undo: the route captured at the start, by
//	                                                            compare-and-set; or SUPERSEDED if it moved
package workflows
