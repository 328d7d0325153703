package nodeconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Option is one field of a Config seen as a flag.
type Option struct {
	Name  string // without dashes
	Usage string
	Value *Value
}

// Value reads and writes one field of a Config as text. It has the methods that
// flag packages ask for.
type Value struct {
	field reflect.Value
	given bool // a list was set: further values are added to it
}

// String returns the field as a flag's argument: lists are joined by commas.
func (v *Value) String() string {
	if v == nil || !v.field.IsValid() {
		return ""
	}
	if list, ok := v.field.Interface().([]string); ok {
		return strings.Join(list, ",")
	}
	return fmt.Sprint(v.field.Interface())
}

// Type returns the word that stands for the argument in help texts.
func (v *Value) Type() string {
	switch v.field.Kind() {
	case reflect.Int:
		return "number"
	case reflect.Bool:
		return "bool"
	case reflect.Slice:
		return "list"
	default:
		return "text"
	}
}

// Set writes the field. The first Set of a list replaces what it held, further
// ones add to it; commas separate several values.
func (v *Value) Set(text string) error {
	switch v.field.Kind() {
	case reflect.Int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return errors.New("not a number")
		}
		v.field.SetInt(int64(n))
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("neither true nor false")
		}
		v.field.SetBool(b)
	case reflect.Slice:
		if !v.given {
			v.field.Set(reflect.Zero(v.field.Type()))
		}
		v.given = true
		for item := range strings.SplitSeq(text, ",") {
			if item = strings.TrimSpace(item); item != "" {
				v.field.Set(reflect.Append(v.field, reflect.ValueOf(item)))
			}
		}
	default:
		v.field.SetString(text)
	}
	return nil
}

// Options returns the fields of c as flags, in the order of the struct.
func (c *Config) Options() []Option {
	var list []Option
	s := reflect.ValueOf(c).Elem()
	for i := range s.NumField() {
		tag := s.Type().Field(i).Tag
		name := tag.Get("flag")
		if name == "" {
			name = tag.Get("yaml")
		}
		list = append(list, Option{name, tag.Get("help"), &Value{field: s.Field(i)}})
	}
	return list
}

// EnvironmentName returns the variable that sets an option.
func EnvironmentName(option string) string {
	return "FLOTILLA_" + strings.ToUpper(strings.ReplaceAll(option, "-", "_"))
}

// Load returns the configuration that results from the defaults, then the
// configuration file, then the environment ("KEY=value"), then the flags: those
// fields of given for which changed reports true. Unknown keys in the file and
// unknown FLOTILLA_ variables are errors that name the nearest known one. The
// result is not validated.
func Load(given *Config, changed func(option string) bool, environ []string) (Config, error) {
	c := Default()
	c.ConfigFile = given.ConfigFile
	vars, err := variables(environ)
	if err != nil {
		return c, err
	}
	if file := vars["config"]; !changed("config") && file != "" {
		c.ConfigFile = file
	}
	if c.ConfigFile != "" {
		if err := c.readFile(c.ConfigFile); err != nil {
			return c, err
		}
	}
	flags := given.Options()
	for i, o := range c.Options() {
		if changed(o.Name) {
			o.Value.field.Set(flags[i].Value.field)
			continue
		}
		if text, ok := vars[o.Name]; ok {
			if err := o.Value.Set(text); err != nil {
				return c, fmt.Errorf("environment: %s=%q: %w", EnvironmentName(o.Name), text, err)
			}
		}
	}
	return c, nil
}

// foreign are variables that are no settings of a node and yet may be there: those
// that the command line reads, and those that units are given.
var foreign = []string{
	"FLOTILLA_CLUSTER", "FLOTILLA_ENDPOINT", "FLOTILLA_TUNNEL", "FLOTILLA_SSH_USERNAME", "FLOTILLA_SSH_TIMEOUT",
	"FLOTILLA_STRICT_HOST_KEY_CHECKING", "FLOTILLA_KNOWN_HOSTS_FILE", "FLOTILLA_SSH_IDENTITY",
	"FLOTILLA_UNIT", "FLOTILLA_MACHINE", "FLOTILLA_EPOCH",
}

// variables returns the settings in environ by option. An empty variable is as good
// as none.
func variables(environ []string) (map[string]string, error) {
	known := map[string]string{}
	for _, o := range new(Config).Options() {
		known[EnvironmentName(o.Name)] = o.Name
	}
	vars := map[string]string{}
	var found []error
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, "FLOTILLA_") {
			continue
		}
		option, ok := known[name]
		if !ok && slices.Contains(foreign, name) {
			continue
		}
		if !ok {
			found = append(found, fmt.Errorf("environment: %s is not a setting of this program%s", name, didYouMean(name, known)))
			continue
		}
		if value != "" {
			vars[option] = value
		}
	}
	return vars, errors.Join(found...)
}

// readFile reads a yaml file over c.
func (c *Config) readFile(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	return c.read(path, raw)
}

// read reads the text of a yaml file over c; errors call it by its path.
func (c *Config) read(path string, raw []byte) error {
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil // an empty file sets nothing
	} else if err != nil {
		return fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: holds more than one document; keep one", path)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: not a list of settings; write lines such as \"http-port: 8080\"", path, root.Line)
	}
	return c.readSettings(path, root.Content)
}

// readSettings reads the pairs of key and value nodes of a yaml mapping.
func (c *Config) readSettings(path string, pairs []*yaml.Node) error {
	fields := map[string]*Value{}
	known := map[string]string{}
	for _, o := range c.Options() {
		if o.Name != "config" {
			fields[o.Name], known[o.Name] = o.Value, o.Name
		}
	}
	var found []error
	seen := map[string]int{}
	for i := 0; i+1 < len(pairs); i += 2 {
		key, value := pairs[i], pairs[i+1]
		v, ok := fields[key.Value]
		switch {
		case !ok:
			found = append(found, fmt.Errorf("%s:%d: unknown setting %q%s", path, key.Line, key.Value, didYouMean(key.Value, known)))
			continue
		case seen[key.Value] != 0:
			found = append(found, fmt.Errorf("%s:%d: %s is already set in line %d", path, key.Line, key.Value, seen[key.Value]))
			continue
		}
		seen[key.Value] = key.Line
		if v.field.Kind() == reflect.Slice && value.Kind == yaml.ScalarNode {
			if err := v.Set(value.Value); err != nil {
				found = append(found, fmt.Errorf("%s:%d: %s: %w", path, value.Line, key.Value, err))
			}
			continue
		}
		if err := value.Decode(v.field.Addr().Interface()); err != nil {
			found = append(found, fmt.Errorf("%s:%d: %s: %q is not a %s", path, value.Line, key.Value, value.Value, v.Type()))
		}
	}
	return errors.Join(found...)
}

// didYouMean returns "; did you mean X?" for the known word nearest to word, or
// "" if none is near.
func didYouMean[V any](word string, known map[string]V) string {
	best, at := 4, ""
	for _, k := range slices.Sorted(maps.Keys(known)) {
		if d := distance(word, k); d < best && d < len(k)/2+1 {
			best, at = d, k
		}
	}
	if at == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %s?", at)
}

// distance is the number of letters to change, add or leave out to turn a into b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
