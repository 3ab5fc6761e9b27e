{{- define "interceptor.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "interceptor.selector" -}}
app.kubernetes.io/name: interceptor-cni
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "interceptor.labels" -}}
{{ include "interceptor.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "interceptor.directories" -}}
- --net-dir={{ .Values.cni.confDir }}
- --bin-dir={{ .Values.cni.binDir }}
{{- if .Values.cni.conflist }}
- --conflist={{ .Values.cni.conflist }}
{{- end }}
{{- end -}}

{{/* "true" where the agent asks the API. */}}
{{- define "interceptor.asksApi" -}}
{{- if and .Values.agent.enabled (ne (toJson .Values.agent.kubernetes) "null") -}}
true
{{- end -}}
{{- end -}}

{{/* The entry's `kubernetes`: the agent's own pods are known by their namespace. */}}
{{- define "interceptor.kubernetes" -}}
{{- toJson (merge (dict "agentNamespace" .Release.Namespace) .Values.agent.kubernetes) -}}
{{- end -}}

{{- define "interceptor.cniMounts" -}}
- name: cni-conf
  mountPath: {{ .Values.cni.confDir }}
- name: cni-bin
  mountPath: {{ .Values.cni.binDir }}
{{- end -}}
