package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
)

func webhookTable(list []client.Webhook) table {
	t := table{header: []string{"ID", "URL", "FORMAT", "TYPES", "MODELS", "POSITION", "CREATED", "BY"}}
	for _, w := range list {
		t.rows = append(t.rows, []string{
			w.Id, w.Url, string(w.Format), strings.Join(w.Types, ","), strings.Join(w.Models, ","), strconv.FormatInt(w.Position, 10), when(w.CreatedAt), w.CreatedBy,
		})
	}
	return t
}

func deliveryTable(list []registry.Delivery) table {
	t := table{header: []string{"AT", "EVENT", "ATTEMPT", "STATUS", "MS", "ERROR"}}
	for _, d := range list {
		fault := d.Error
		if d.GivenUp {
			fault += " (given up)"
		}
		t.rows = append(t.rows, []string{when(d.At), strconv.FormatInt(d.Event, 10), strconv.Itoa(d.Attempt), strconv.Itoa(d.Status), strconv.FormatInt(d.Millis, 10), fault})
	}
	return t
}

func (c *connection) webhookCommand() *cobra.Command {
	root := &cobra.Command{Use: "webhook", Short: "Tell other systems what happens"}
	var types, models []string
	var format string
	create := &cobra.Command{Use: "create URL", Short: "Send events to an address from now on; the secret is shown once", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		f := client.NewWebhookFormat(format)
		w, err := decode[client.Webhook](api.CreateWebhook(cmd.Context(), client.NewWebhook{Url: args[0], Format: &f, Types: &types, Models: &models}))
		if err != nil {
			return err
		}
		return c.print(w, fields("id", w.Id, "url", w.Url, "format", string(w.Format), "secret", deref(w.Secret)))
	}}
	create.Flags().StringVar(&format, "format", "cloudevents", "cloudevents or slack")
	create.Flags().StringSliceVar(&types, "types", nil, "event types, such as run.changed or route.*; none given is all")
	create.Flags().StringSliceVar(&models, "models", nil, "only events of these models")
	list := &cobra.Command{Use: "list", Short: "List webhooks", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		hooks, err := decode[[]client.Webhook](api.ListWebhooks(cmd.Context()))
		if err != nil {
			return err
		}
		return c.print(hooks, webhookTable(hooks))
	}}
	remove := &cobra.Command{Use: "delete ID", Short: "Send no more", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		_, err = body(api.DeleteWebhook(cmd.Context(), args[0]))
		return err
	}}
	root.AddCommand(create, list, remove, c.webhookDeliveries(), c.webhookReplay(), c.webhookTest())
	return root
}

func (c *connection) webhookDeliveries() *cobra.Command {
	return &cobra.Command{Use: "deliveries ID", Short: "List what was sent, newest first, with what came back", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]registry.Delivery](api.ListDeliveries(cmd.Context(), args[0], nil))
		if err != nil {
			return err
		}
		return c.print(list, deliveryTable(list))
	}}
}

func (c *connection) webhookReplay() *cobra.Command {
	var from int64
	cmd := &cobra.Command{Use: "replay ID", Short: "Send events again, from a number on", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		_, err = body(api.ReplayWebhook(cmd.Context(), args[0], client.ReplayWebhookJSONRequestBody{From: from}))
		return err
	}}
	cmd.Flags().Int64Var(&from, "from", 1, "number of the first event")
	return cmd
}

func (c *connection) webhookTest() *cobra.Command {
	return &cobra.Command{Use: "test ID", Short: "Send a test event now", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		d, err := decode[registry.Delivery](api.TestWebhook(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		if err := c.print(d, deliveryTable([]registry.Delivery{d})); err != nil || d.Error == "" {
			return err
		}
		return &exitError{exitFailed, fmt.Errorf("the webhook did not take it: %s", d.Error)}
	}}
}
