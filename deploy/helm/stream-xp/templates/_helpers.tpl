{{- define "stream-xp.fullname" -}}
{{- if contains "stream-xp" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-stream-xp" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "stream-xp.selector" -}}
app.kubernetes.io/name: stream-xp
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "stream-xp.labels" -}}
{{ include "stream-xp.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "stream-xp.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* What every pod of the chart is held to. */}}
{{- define "stream-xp.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "stream-xp.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Every setting but those of one program, by its variable. */}}
{{- define "stream-xp.settings" -}}
{{- $kafka := .Values.kafka }}
{{- if and (eq $kafka.securityProtocol "SASL_SSL") (not (and $kafka.saslUsername $kafka.saslPasswordSecret.name)) }}
{{- fail "kafka.securityProtocol SASL_SSL needs kafka.saslUsername and kafka.saslPasswordSecret.name" }}
{{- end }}
{{- if and (ne $kafka.securityProtocol "PLAINTEXT") (not $kafka.caSecret.name) }}
{{- fail "kafka.securityProtocol SSL and SASL_SSL need kafka.caSecret.name" }}
{{- end }}
{{- if gt (int $kafka.minInsyncReplicas) (int $kafka.replication) }}
{{- fail "kafka.minInsyncReplicas must be at most kafka.replication" }}
{{- end }}
STREAM_XP_BOOTSTRAP: {{ required "kafka.bootstrap must be set: host:port, separated by commas" $kafka.bootstrap | quote }}
STREAM_XP_SECURITY_PROTOCOL: {{ $kafka.securityProtocol | quote }}
{{- if ne $kafka.securityProtocol "PLAINTEXT" }}
STREAM_XP_SSL_CA_FILE: /etc/stream-xp/ca/ca.crt
{{- if $kafka.clientCertSecret.name }}
STREAM_XP_SSL_CERT_FILE: /etc/stream-xp/client/tls.crt
STREAM_XP_SSL_KEY_FILE: /etc/stream-xp/client/tls.key
{{- end }}
{{- end }}
{{- if eq $kafka.securityProtocol "SASL_SSL" }}
STREAM_XP_SASL_MECHANISM: {{ $kafka.saslMechanism | quote }}
STREAM_XP_SASL_USERNAME: {{ $kafka.saslUsername | quote }}
STREAM_XP_SASL_PASSWORD_FILE: /etc/stream-xp/password/password
{{- end }}
STREAM_XP_PREFIX: {{ $kafka.prefix | quote }}
STREAM_XP_GROUP_ID: {{ $kafka.groupId | quote }}
STREAM_XP_PARTITIONS: {{ $kafka.partitions | quote }}
STREAM_XP_REPLICATION: {{ $kafka.replication | quote }}
STREAM_XP_MIN_INSYNC_REPLICAS: {{ $kafka.minInsyncReplicas | quote }}
{{- range $name, $value := .Values.settings }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "stream-xp.envFrom" -}}
envFrom:
  - configMapRef: {name: {{ include "stream-xp.fullname" . }}}
{{- end -}}

{{/* Where the credentials are mounted: the settings name files, never values. */}}
{{- define "stream-xp.secretMounts" -}}
{{- with .Values.kafka.caSecret }}{{ if .name }}
- {name: kafka-ca, mountPath: /etc/stream-xp/ca, readOnly: true}
{{- end }}{{ end }}
{{- with .Values.kafka.clientCertSecret }}{{ if .name }}
- {name: kafka-client, mountPath: /etc/stream-xp/client, readOnly: true}
{{- end }}{{ end }}
{{- with .Values.kafka.saslPasswordSecret }}{{ if .name }}
- {name: kafka-password, mountPath: /etc/stream-xp/password, readOnly: true}
{{- end }}{{ end }}
{{- end -}}

{{- define "stream-xp.secretVolumes" -}}
{{- with .Values.kafka.caSecret }}{{ if .name }}
- name: kafka-ca
  secret: {secretName: {{ .name }}, defaultMode: 288, items: [{key: {{ .key }}, path: ca.crt}]}
{{- end }}{{ end }}
{{- with .Values.kafka.clientCertSecret }}{{ if .name }}
- name: kafka-client
  secret: {secretName: {{ .name }}, defaultMode: 288, items: [{key: {{ .certKey }}, path: tls.crt}, {key: {{ .keyKey }}, path: tls.key}]}
{{- end }}{{ end }}
{{- with .Values.kafka.saslPasswordSecret }}{{ if .name }}
- name: kafka-password
  secret: {secretName: {{ .name }}, defaultMode: 288, items: [{key: {{ .key }}, path: password}]}
{{- end }}{{ end }}
{{- end -}}
