package activities

import (
	"context"
	"time"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
)

const (
	labelsEvery = 20 * time.Second // the object store is looked at for records and labels
	maxJoined   = 500_000          // answers that wait for their label; further ones are left out
)

// labelled joins what versions answered with the labels that come later. It lives as long as one bake activity, and
// reads each file once.
type labelled struct {
	objects registry.Objects
	at      time.Time
	read    map[string]bool
	answers map[string]answer // by inference id
	labels  map[string]float64
	loss    map[int]monitor.Moments // of squared errors, by version
}

// answer is what a version said: the last number of its first output, which is the probability of the positive class or
// the estimate.
type answer struct {
	version int
	value   float64
}

func newLabelled(o registry.Objects) *labelled {
	return &labelled{objects: o, read: map[string]bool{}, answers: map[string]answer{}, labels: map[string]float64{}, loss: map[int]monitor.Moments{}}
}

// look reads the files that are new, now and then.
func (l *labelled) look(ctx context.Context, in BakeInput, now time.Time) error {
	if in.Judge.MaxLossGain == 0 || l.objects == nil || now.Sub(l.at) < labelsEvery {
		return nil
	}
	keys, err := records.Window(ctx, l.objects, records.Slice{Prefix: records.RecordPrefix, Model: in.Model, From: in.Began, To: now.Add(time.Hour)})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if l.read[key] {
			continue
		}
		err := records.ReadOutputs(ctx, l.objects, key, func(id string, version int, outputs []float64) {
			if len(outputs) > 0 && len(l.answers) < maxJoined {
				l.answers[id] = answer{version, outputs[len(outputs)-1]}
			}
		})
		if err != nil {
			return err
		}
		l.read[key] = true
	}
	for o, err := range l.objects.List(ctx, records.LabelPrefix+"model="+in.Model+"/") {
		if err != nil {
			return err
		}
		if l.read[o.Key] || o.Modified.Before(in.Began) {
			continue
		}
		if err := records.ReadLabels(ctx, l.objects, o.Key, l.labels); err != nil {
			return err
		}
		l.read[o.Key] = true
	}
	l.join()
	l.at = now
	return nil
}

// join turns answers that have their label into losses. A label stays until its answer comes, which may be later: records
// are written every few seconds.
func (l *labelled) join() {
	for id, y := range l.labels {
		a, ok := l.answers[id]
		if !ok {
			continue
		}
		e := (a.value - y) * (a.value - y)
		m := l.loss[a.version]
		m.Merge(monitor.Moments{N: 1, Sum: e, Squares: e * e})
		l.loss[a.version] = m
		delete(l.answers, id)
		delete(l.labels, id)
	}
	if len(l.labels) > maxJoined { // of requests from before
		clear(l.labels)
	}
}

// difference returns how much a version's mean loss exceeds the reference's, nil when labels are not compared.
func (l *labelled) difference(in BakeInput, c monitor.JudgeConfig, version int) *monitor.Difference {
	if in.Judge.MaxLossGain == 0 {
		return nil
	}
	d := monitor.Compare(l.loss[in.Reference], l.loss[version], c.MetricBudget())
	d.Version = version
	return &d
}
