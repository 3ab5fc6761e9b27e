// Render a Helm chart's templates with Go's own template engine, which is Helm's, and the few functions our chart uses.
// For machines without helm: standard library alone. Usage: go run render.go DIRECTORY <VALUES.json; one template after the other on stdout.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"text/template"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(directory string) error {
	var context map[string]interface{}
	if err := json.NewDecoder(os.Stdin).Decode(&context); err != nil {
		return err
	}
	root := template.New("chart").Option("missingkey=error")
	root.Funcs(functions(root))
	names, err := filepath.Glob(filepath.Join(directory, "templates", "*"))
	if err != nil {
		return err
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if _, err := root.New(filepath.Base(name)).Parse(string(text)); err != nil {
			return err
		}
	}
	for _, name := range names {
		base := filepath.Base(name)
		if strings.HasPrefix(base, "_") || !strings.HasSuffix(base, ".yaml") {
			continue
		}
		fmt.Printf("---\n# Source: %s\n", base)
		if err := root.ExecuteTemplate(os.Stdout, base, context); err != nil {
			return err
		}
		fmt.Println()
	}
	return nil
}

// yamlLines is a value from JSON as block YAML; scalars stay JSON, which YAML takes.
func yamlLines(value interface{}) []string {
	lines := []string{}
	add := func(head string, child interface{}) {
		below := yamlLines(child)
		_, isMap := child.(map[string]interface{})
		_, isList := child.([]interface{})
		if (isMap || isList) && head != "- " && below[0] != "{}" && below[0] != "[]" {
			lines = append(lines, strings.TrimSuffix(head, " "))
			head = "  "
		}
		for number, line := range below {
			if number > 0 {
				head = "  "
			}
			lines = append(lines, head+line)
		}
	}
	switch found := value.(type) {
	case map[string]interface{}:
		keys := []string{}
		for key := range found {
			keys = append(keys, key)
		}
		sort.Strings(keys)
		for _, key := range keys {
			add(key+": ", found[key])
		}
		if len(keys) == 0 {
			return []string{"{}"}
		}
	case []interface{}:
		for _, item := range found {
			add("- ", item)
		}
		if len(found) == 0 {
			return []string{"[]"}
		}
	default:
		text, _ := json.Marshal(value)
		return []string{string(text)}
	}
	return lines
}

func functions(root *template.Template) template.FuncMap {
	toJSON := func(value interface{}) (string, error) {
		text := &bytes.Buffer{}
		encoder := json.NewEncoder(text)
		encoder.SetEscapeHTML(false)
		err := encoder.Encode(value)
		return strings.TrimSuffix(text.String(), "\n"), err
	}
	indent := func(count int, text string) string {
		space := strings.Repeat(" ", count)
		return space + strings.ReplaceAll(text, "\n", "\n"+space)
	}
	return template.FuncMap{
		"include": func(name string, data interface{}) (string, error) {
			text := &bytes.Buffer{}
			err := root.ExecuteTemplate(text, name, data)
			return text.String(), err
		},
		"toJson":  toJSON,
		"toYaml":  func(value interface{}) string { return strings.Join(yamlLines(value), "\n") },
		"nindent": func(count int, text string) string { return "\n" + indent(count, text) },
		"quote":   func(value interface{}) string { return fmt.Sprintf("%q", fmt.Sprint(value)) },
		"dir":     path.Dir,
		"dict": func(pairs ...interface{}) map[string]interface{} {
			found := map[string]interface{}{}
			for at := 0; at+1 < len(pairs); at += 2 {
				found[pairs[at].(string)] = pairs[at+1]
			}
			return found
		},
		// Of equal keys the first map's wins, as in sprig.
		"merge": func(first, second map[string]interface{}) map[string]interface{} {
			for key, value := range second {
				if _, there := first[key]; !there {
					first[key] = value
				}
			}
			return first
		},
	}
}
